"""Every race there is. An operator joins with one file of its own and its name here."""

from attnkit._core.registry import Registry
from attnkit.lab.bench import attention, entmax, entmax_attention, expected, indexed, ragged, recurrent
from attnkit.lab.bench.race import Race

__all__ = ["RACES"]

RACES: Registry[Race] = Registry("race")
_OTHERS = (attention.RACE, entmax.RACE, entmax_attention.RACE, indexed.HASH_RACE, indexed.QK_RACE, ragged.RACE)
for _race in (*_OTHERS, expected.RACE, *recurrent.RACES):
    RACES.register(_race.op, _race)
