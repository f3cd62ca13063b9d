"""From statistics to parameters: closed forms, the training that goes on from them, and the errors of both."""

from .fit import fit, fit_all
from .training import Training
