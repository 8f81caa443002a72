"""Private parts of other libraries: the table of them, and functions that read or replace them. Imports no room."""
