"""What papers claim, tested small: a registry of experiments, and one way to run, keep and show them.

A claim is one file: settings (a frozen dataclass), cells (functions that train or measure and return rows), `conclude`
(rows -> verdict, figures, tables), and a `Claim` that `catalogue.py` registers. Trainings go through `Place.train`.
"""

from attnkit._core.lazy import lazy_attributes

__all__ = ["CLAIMS", "OUTCOMES", "Cell", "Claim", "Conclusion", "Place", "Verdict", "run"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        "CLAIMS": "attnkit.lab.claims.catalogue",
        "OUTCOMES": "attnkit.lab.claims.claim",
        "Cell": "attnkit.lab.claims.claim",
        "Claim": "attnkit.lab.claims.claim",
        "Conclusion": "attnkit.lab.claims.claim",
        "Place": "attnkit.lab.claims.place",
        "Verdict": "attnkit.lab.claims.claim",
        "run": "attnkit.lab.claims.runner",
    },
)
