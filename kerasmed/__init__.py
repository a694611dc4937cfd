"""kerasmed: medical image classification in Keras, as numbered notebooks over a thin package."""

import os

__version__ = "0.1.0"

# Albumentations asks a package index for newer versions on import unless this is set before it.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# Hides TensorFlow's start-up information (CPU features, absent CUDA); warnings and errors stay.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
