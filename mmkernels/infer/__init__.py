"""Inference: trained models at work."""

from mmkernels.infer.any_to_any import AnyToAny as AnyToAny
from mmkernels.infer.captioner import Captioner as Captioner
from mmkernels.infer.meter import Meter as Meter
