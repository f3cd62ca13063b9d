"""Names, colours, markers and lines: the one table for all figures and for the site.

Names that meet in a panel differ in colour, and also in marker or line, so that they differ in greyscale.
"""

from __future__ import annotations

from ...methods.registry import METHODS

Look = dict[str, str]  # keywords of Axes.plot

# Okabe and Ito's, which colour-blind readers can tell apart; then others for whatever needs one more.
BLUE, SKY, GREEN, ORANGE, VERMILION, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
FOREST, TEAL, INDIGO, VIOLET, PURPLE, WINE, BROWN = "#117733", "#44AA99", "#332288", "#7B6FD0", "#AA4499", "#882255", "#661100"
OLIVE, ROSE, SAND, SLATE, CLAY = "#999933", "#CC6677", "#DDCC77", "#55607A", "#B3704D"
BLACK, GREY, DIM = "#000000", "#999999", "#666666"
INK = "0.2"  # of the dense model


def _look(color: str, marker: str, linestyle: str = "") -> Look:
    return {"color": color, "marker": marker, "linestyle": linestyle}


FAMILY_LOOKS = {
    "Mean": _look(GREY, "X", ":"),
    "Linear": _look(ORANGE, "D", ":"),
    "LowRank": _look(VERMILION, "s", "--"),
    "NarrowMLP": _look(BLUE, "o", "-"),
    "NarrowPlusLinear": _look(SKY, "v", "-."),
    "TwoLayerMLP": _look(PINK, "^", "--"),
    "ConvMLP": _look(FOREST, "P", "-."),
    "AttentionMLP": _look(WINE, ">", "--"),
    "MixtureOfExperts": _look(VIOLET, "h", "-"),
    "NestedMLP": _look(TEAL, "<", "-"),
    "TransformerBlock": _look(BLACK, "*", ":"),
    "Removed": _look(BROWN, "p", ":"),
    "Tuned": _look(INDIGO, "d", "-"),
    "Merged": _look(PURPLE, "H", "-"),
    "NarrowAttention": _look(GREEN, "8", "--"),
    "NarrowPlusMean": _look(OLIVE, "1", "-."),
    "NarrowAttentionPlusMean": _look(ROSE, "2", "-."),
    "FactoredMLP": _look(SAND, "+", ":"),
    "FactoredAttention": _look(SLATE, "x", ":"),
}
SELECTION_LOOKS = {
    "energy": _look(BLUE, "o", "-"),
    "fluctuation": _look(OLIVE, "1", ":"),
    "leverage": _look(ORANGE, "D", "-."),
    "obs": _look(FOREST, "P", "--"),
    "fisher": _look(VERMILION, "s", "--"),
    "fisher_energy": _look(PINK, "^", "-"),
    "random": _look(DIM, "X", ":"),
}
OBJECTIVE_LOOKS = {"mse": _look(BLUE, "o"), "cosine": _look(ORANGE, "D"), "both": _look(FOREST, "P")}
KIND_LOOKS = {"attention": _look(VERMILION, "s", "--"), "MLP": _look(BLUE, "o", "-")}
ALLOCATION_LOOKS = {  # notebook 04
    "uniform": _look(SKY, "v", "--"),
    "greedy": _look(ORANGE, "D", "-."),
    "nested": _look(GREEN, "P", "--"),
    "knapsack": _look(PINK, "^", ":"),
    "recipe": _look(BLUE, "o", "-"),
    "recipe + healing": _look(VERMILION, "s", "-"),
    "recipe + long healing": _look(WINE, ">", "-"),
}
METHOD_LOOKS = ALLOCATION_LOOKS | {  # notebook 05: the methods of mlpreplace.methods
    "uniform_refit": _look(BROWN, "p", "--"),
    "subfit": _look(PINK, "^", "--"),
    "subfit_shared": _look(CLAY, "3", "-"),
    "shortgpt": _look(ORANGE, "X", ":"),
    "shortgpt_linear": _look(FOREST, "P", "-."),
    "uidl": _look(BLACK, "*", ":"),
    "uidl_linear": _look(WINE, ">", "-."),
    "replaceme": _look(GREEN, "D", "-."),
    "replaceme_cosine": _look(TEAL, "<", "-."),
    "streamline_layer": _look(PURPLE, "h", "--"),
    "streamline_mlp": _look(INDIGO, "d", "--"),
    "flap": _look(OLIVE, "1", ":"),
    "flap_refit": _look(ROSE, "2", "--"),
    "modegpt": _look(SLATE, "H", "-."),
    "svd_llm": _look(SAND, "+", "--"),
}
MERGING_LOOKS = {  # notebook 06
    "merged": FAMILY_LOOKS["Merged"],
    "unpermuted": _look(ORANGE, "D", "-."),
    "deleted": _look(GREY, "X", ":"),
    "dropped": FAMILY_LOOKS["Removed"],
    "replaced": FAMILY_LOOKS["NarrowMLP"] | {"linestyle": "--"},
}
QUANTIZATION_LOOKS = {  # (quantized, replaced)
    (False, False): _look(INK, "*"),
    (True, False): _look(ORANGE, "s"),
    (False, True): _look(BLUE, "o"),
    (True, True): _look(WINE, "D"),
}

# By place, for names that are not known before:
TEXT_LOOKS = (_look(BLUE, "o", "-"), _look(VERMILION, "s", "--"), _look(FOREST, "P", "-."))
SERIES_LOOKS = (
    _look(BLUE, "o", "-"),
    _look(VERMILION, "s", "--"),
    _look(GREEN, "D", "-."),
    _look(PINK, "^", ":"),
    _look(ORANGE, "v", "--"),
    _look(SKY, "P", "-"),
    _look(BLACK, "X", "-."),
)
NAMES = {  # of bundled texts and tasks, for people to read
    "bundled/wiki": "Wikipedia",
    "bundled/speeches": "speeches",
    "bundled/code": "Python code",
    "bundled/passages": "prose",
    "bundled/dialogue": "dialogue",
    "bundled/documentation": "documentation",
    "bundled/mixture": "half Wikipedia, half other prose",
    "bundled/mnist": "MNIST",
    "bundled/piqa": "PIQA",
    "bundled/siqa": "Social IQa",
    "bundled/csqa": "CommonsenseQA",
    "bundled/obqa": "OpenBookQA",
    "bundled/sst2": "SST-2",
    "bundled/cola": "CoLA",
    "mlp": "MLP",
    "fisher": "Fisher",
    "fisher_energy": "Fisher × energy",
    "obs": "OBS",
}
HEALED = " + healing", " + long healing"


def readable(name: str) -> str:
    """A method, a text or a task as people read it: "ReplaceMe, cosine" for "replaceme_cosine"; other names as they are."""
    healed = next((ending for ending in HEALED if name.endswith(ending)), "")
    plain = name.removesuffix(healed)
    if plain in METHODS:
        return METHODS[plain].title.removeprefix("our ") + healed
    return NAMES.get(name, name)
