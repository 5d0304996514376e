"""What rests while a block is locked, by the names that networks give their parameters: for schedules and for locks alike.

No torch: a schedule says by itself what a job has to do, also to one that has no curv.
"""

from __future__ import annotations

# Last component of a projection that writes to the residual stream, in transformers, nanoGPT, Llama's
# original code and torchtitan. "dense" is one only inside an attention (NeoX, Bloom, Falcon).
OUTPUTS = (
    "o_proj", "out_proj", "c_proj", "down_proj", "output_linear", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2", "o",
    "proj_out",
)  # fmt: skip
# Norms behind the projections, as (attention's, MLP's); a block has all of one pair or none counts.
POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
# Of a parameter's name within its block; searched, not matched from the start.
OUTPUT_PATTERN = rf"(?:(?:^|\.)(?:{'|'.join(OUTPUTS)})|(?:attention|attn).*\.dense)(?:_bias)?(?:\.(?:weight|bias))?$"
# Of a parameter's name in the model, by the first whole number in it: the stack, the block's index, the name within.
BLOCK_PATTERN = r"^(?:(.+?)\.)??(\d+)\.(.+)$"
