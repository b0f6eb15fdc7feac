"""`python -m helixpipe` is `helixpipe`."""

import sys

from helixpipe.cli import main

sys.exit(main())
