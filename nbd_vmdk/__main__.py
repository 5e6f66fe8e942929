"""``python -m nbd_vmdk`` is ``nbd-vmdk``."""

import sys

from nbd_vmdk.cli import main

sys.exit(main())
