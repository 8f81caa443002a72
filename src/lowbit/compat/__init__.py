"""Every use of a private part of another library: ``parts`` says which and reads them, ``patches`` replaces them."""
