"""megatron-core's parallel state in the words of DeepSpeed's ``mpu`` protocol."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


class MegatronUnit:
    """What DeepSpeed asks its ``mpu``: which ranks share a model and which share data.

    "Data" counts context parallel ranks in: like data parallel ones they hold the same parameters and add up their
    gradients. There are no pipeline stages.
    """

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return self.get_model_parallel_group().rank()

    def get_model_parallel_world_size(self) -> int:
        return self.get_model_parallel_group().size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.get_model_parallel_group())[0]

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())
