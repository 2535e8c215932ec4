"""Modules over ops: token mixers, channel mixers, merges, and the stack made of them."""

from plait.layers.channels import Channels as Channels
from plait.layers.channels import Listener as Listener
from plait.layers.context import Context as Context
from plait.layers.context import context_for as context_for
from plait.layers.context import pooled_context as pooled_context
from plait.layers.stack import Sublayer as Sublayer
from plait.layers.stack import announce as announce
from plait.layers.stack import build_stack as build_stack
from plait.layers.stack import normed as normed
