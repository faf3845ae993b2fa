"""Plans of slices: from the size of a picture alone to boxes, sizes, token counts and the order of tokens."""

from mmkernels.data.slicing.llava import PINPOINTS as PINPOINTS
from mmkernels.data.slicing.llava import llava_next as llava_next
from mmkernels.data.slicing.plan import Plan as Plan
from mmkernels.data.slicing.plan import Plans as Plans
from mmkernels.data.slicing.plan import check_context as check_context
from mmkernels.data.slicing.plan import check_slices as check_slices
from mmkernels.data.slicing.slime import slime as slime
from mmkernels.data.slicing.uhd import llava_uhd as llava_uhd
from mmkernels.data.slicing.windows import fuyu as fuyu
from mmkernels.data.slicing.windows import monkey as monkey
