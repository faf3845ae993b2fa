"""From pictures of any size to the packed patches that a vision tower reads."""

from mmkernels.data.front_end.front_end import RULES as RULES
from mmkernels.data.front_end.front_end import FrontEnd as FrontEnd
from mmkernels.data.front_end.front_end import Packed as Packed
