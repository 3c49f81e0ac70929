"""
Makes accelerate use FSDP on CPU processes: it refuses only by the type of the device. What follows is the real FSDP of
torch over gloo. Import before a trainer is made.
"""

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel


_init_state = AcceleratorState.__init__
_init_fsdp1 = FullyShardedDataParallel.__init__


def _init_state_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _init_fsdp1_on_cpu(self, *args, device_id=None, **kwargs):
    _init_fsdp1(self, *args, device_id=torch.device("cpu"), **kwargs)


AcceleratorState.__init__ = _init_state_with_fsdp
FullyShardedDataParallel.__init__ = _init_fsdp1_on_cpu
