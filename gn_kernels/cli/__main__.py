"""``python -m gn_kernels.cli``, which torchrun takes too."""

import sys

from gn_kernels.cli import main

sys.exit(main())
