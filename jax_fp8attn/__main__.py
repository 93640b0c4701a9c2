"""python -m jax_fp8attn demo | env | explain"""

import sys

from jax_fp8attn.cli import main

sys.exit(main(sys.argv[1:]))
