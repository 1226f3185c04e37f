"""Adapters by short name: `dataset_adapter` in a config -> dotted path of a function rows -> rows.

An adapter takes the rows of a source and yields rows in one of our layouts (README, "Data"). One that takes a
keyword `bad` is given the stage's `BadRows` and reports rows it cannot use; one that does not raises ValueError.
`dataset_adapter_options` are its other keywords.
"""

ADAPTERS = {
    "oasst_conversations": "posttrain.data.oasst.oasst_conversations",
    "oasst_rankings": "posttrain.data.oasst.oasst_rankings",
    "gsm8k": "posttrain.data.math.gsm8k",
    "gsm8k_conversations": "posttrain.data.math.gsm8k_conversations",
    "hh_pairs": "posttrain.data.preferences.hh_pairs",
}
