"""The command line in one of several processes on a CPU, where accelerate has FSDP2 for accelerators alone.

torch's ``fully_shard`` itself works on a CPU; this tells accelerate that the processes are of the kind it shards.
"""

from typing import Any

from accelerate.utils import DistributedType

from accelerate import PartialState
from shadowpeft.cli import main

plain_init = PartialState.__init__


def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
    plain_init(self, *args, **kwargs)
    self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = init
    main()
