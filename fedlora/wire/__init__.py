"""The only codec between Flower's records and fedlora's values; it also counts the bytes.

A training message holds, under Flower's usual names,

* ``arrays``: the factors and head tensors that travel, under PEFT's state-dict keys, so that any
  PEFT ClientApp can load them and answer in the same form; or all of them in one array, see
  `fedlora.wire.arrays`;
* ``parts``: base patches that the client is not known to hold, named by their digest;
* ``config``: the round, which factors to train and to send back, and the digests of everything the
  client must hold (`Needs`). A client that lacks one answers ``missing`` and is served in the same round.

A reply holds ``arrays``, ``metrics`` (``num-examples``, ...) and ``config`` with its ``status``; the arrays
as floats, or written by the codec that the instruction names, see `fedlora.wire.upload`.
Nothing here unpickles: arrays are NumPy's own format with pickling refused, or safetensors.
"""

from fedlora.core.peft_keys import PREFIX, PeftTensors, from_peft, key_of, to_peft
from fedlora.secure.step import MASKED
from fedlora.wire.arrays import ARRAYS, CONFIG, METRICS, PARTS, from_record, nbytes, payload_bytes, to_record
from fedlora.wire.broadcast import (
    frozen_part,
    frozen_tensors,
    head_tensors,
    layer_parts,
    layers_travelled,
    moving_part,
    moving_tensors,
)
from fedlora.wire.instruction import (
    INSTRUCTION_KEYS,
    Needs,
    TrainInstruction,
    complete_adapters,
    decode_instruction,
    identity,
    instruction_config,
    instruction_settings,
    names,
    parts_record,
)
from fedlora.wire.reply import (
    DECLINED,
    MISSING,
    OK,
    Reply,
    array_record,
    decode_reply,
    encode_reply,
    metrics_in,
)
from fedlora.wire.secure import (
    Summed,
    from_noisy_row,
    from_row,
    masked_record,
    masked_row,
    row_length,
    start_digest,
    step_bytes,
    to_noisy_row,
    to_row,
)
from fedlora.wire.seeds import MOST_MOVES, written
from fedlora.wire.upload import CODECS, UploadCodec, codec_named, most_bytes, with_owed
from fedlora.wire.validation import check_range

__all__ = [
    "ARRAYS",
    "CODECS",
    "CONFIG",
    "DECLINED",
    "INSTRUCTION_KEYS",
    "MASKED",
    "METRICS",
    "MISSING",
    "MOST_MOVES",
    "OK",
    "PARTS",
    "PREFIX",
    "Needs",
    "PeftTensors",
    "Reply",
    "Summed",
    "TrainInstruction",
    "UploadCodec",
    "array_record",
    "check_range",
    "codec_named",
    "complete_adapters",
    "decode_instruction",
    "decode_reply",
    "encode_reply",
    "from_noisy_row",
    "from_peft",
    "from_record",
    "from_row",
    "frozen_part",
    "frozen_tensors",
    "head_tensors",
    "identity",
    "instruction_config",
    "instruction_settings",
    "key_of",
    "layer_parts",
    "layers_travelled",
    "masked_record",
    "masked_row",
    "metrics_in",
    "most_bytes",
    "moving_part",
    "moving_tensors",
    "names",
    "nbytes",
    "parts_record",
    "payload_bytes",
    "row_length",
    "start_digest",
    "step_bytes",
    "to_noisy_row",
    "to_peft",
    "to_record",
    "to_row",
    "with_owed",
    "written",
]
