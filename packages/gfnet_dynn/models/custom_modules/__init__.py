"""What an exit is made of: uncertainty features, gates, and the policy that decides."""

from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy, exit_probabilities
from gfnet_dynn.models.custom_modules.gate import IdentityGate, UncertaintyGate, make_gate
from gfnet_dynn.models.custom_modules.uncertainty import uncertainty

__all__ = [
    "ExitPolicy",
    "IdentityGate",
    "UncertaintyGate",
    "exit_probabilities",
    "make_gate",
    "uncertainty",
]
