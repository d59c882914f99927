"""The contestants' names, in the order in which they take their turns, and what a table calls them. No torch."""

FLOOR, SINGLE_DENSE, PAIR_DENSE, PUBLISHED = "floor", "single_dense", "pair_dense", "published"
OURS_WITHOUT, OURS, OURS_QUARTER = "ours_without_penalty", "ours", "ours_quarter"
MODEL = "language_model"

LABELS = {
    FLOOR: "floor: the dense products alone, forward",
    SINGLE_DENSE: "one traditional SAE, dense",
    PAIR_DENSE: "traditional pair, dense",
    PUBLISHED: "JSAE as published, dense",
    OURS_WITHOUT: "ours, without the penalty",
    OURS: "ours, with the penalty",
    OURS_QUARTER: "ours, the penalty on every fourth step",
    MODEL: "language model, forward up to its layer",
}
NAMES = tuple(LABELS)
