"""The mLSTM: a linear recurrence with exponential or sigmoid gates and a normaliser."""
