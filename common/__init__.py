"""What the task scripts share. Importing it registers Phi-3-vision and Phi-3.5-vision with transformers."""

from . import phi3v as phi3v
