"""From an attention model to a hybrid: which layers stay, what the others become, and what they start from."""

from plait.convert.fit import fitted as fitted
from plait.convert.plan import Cost as Cost
from plait.convert.plan import Plan as Plan
from plait.convert.plan import attention_places as attention_places
from plait.convert.transfer import student_of as student_of
