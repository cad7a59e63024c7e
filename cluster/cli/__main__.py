"""``python -m cluster.cli``, for where the ``dspark`` script is not on the path."""

import sys

from cluster.cli import main

sys.exit(main())
