"""Adapters by short name: `dataset_adapter` in a config -> dotted path of a function rows -> rows.

An adapter takes the rows of a source and yields rows in one of our layouts (README, "Data"). One that takes a
keyword `bad` is given the stage's `BadRows` and reports rows it cannot use; one that does not raises ValueError.
`dataset_adapter_options` are its other keywords.
"""

ADAPTERS = {
    "identity": "posttrain.data.identity.identity",
    "identity_prompts": "posttrain.data.identity.identity_prompts",
    "oasst_conversations": "posttrain.data.oasst.oasst_conversations",
    "oasst_rankings": "posttrain.data.oasst.oasst_rankings",
    "hh_pairs": "posttrain.data.preferences.hh_pairs",
    "hh_conversations": "posttrain.data.preferences.hh_conversations",
    "ultrafeedback_pairs": "posttrain.data.preferences.ultrafeedback_pairs",
    "ultrafeedback_rankings": "posttrain.data.preferences.ultrafeedback_rankings",
    "preference_pairs": "posttrain.data.preferences.preference_pairs",
    "ultrachat": "posttrain.data.dialogues.ultrachat",
    "sharegpt": "posttrain.data.dialogues.sharegpt",
    "alpaca": "posttrain.data.dialogues.alpaca",
    "tool_conversations": "posttrain.data.tools.tool_conversations",
    "gsm8k": "posttrain.data.math.gsm8k",
    "gsm8k_conversations": "posttrain.data.math.gsm8k_conversations",
    "math_problems": "posttrain.data.math.math_problems",
    "math_conversations": "posttrain.data.math.math_conversations",
    "countdown": "posttrain.data.math.countdown",
    "humaneval": "posttrain.data.code.humaneval",
    "mbpp": "posttrain.data.code.mbpp",
    "plain_text": "posttrain.data.text.plain_text",
}
