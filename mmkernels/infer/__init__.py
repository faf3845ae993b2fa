"""Inference: trained models at work."""

from mmkernels.infer.captioner import Captioner as Captioner
from mmkernels.infer.meter import Meter as Meter
