"""What goes beside a widened model's weights when it is shared: the code that loads it where this package is not."""

from .modeling_code import CODE_FILE, generate_modeling_code, write_modeling_code

__all__ = ["CODE_FILE", "generate_modeling_code", "write_modeling_code"]
