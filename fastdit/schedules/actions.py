"""What a block is told about each of its components, as flags: the words between plans and blocks.

* COMPUTE: run the component. REUSE: read its slot. Neither: nobody reads it at this step, so it does not run at all
  (a FLUX attention whose `proj_out` is reused).
* KEEP: a later step reads the value that is current after this step, so the slot stays; without it the slot is freed.
"""

from collections.abc import Mapping

COMPUTE, REUSE, KEEP = 1, 2, 4

#: component -> flags, for one block at one step
BlockActions = Mapping[str, int]
