from tests.support.small_models import checkpoint, config, family, one_thread, z_family

__all__ = ["checkpoint", "config", "family", "one_thread", "z_family"]
