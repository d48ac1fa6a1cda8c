"""What the task scripts share. Importing it registers Phi-3-vision and Phi-3.5-vision with transformers."""

import logging

from . import phi3v as phi3v

# bitsandbytes asks CPU users for a package that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
