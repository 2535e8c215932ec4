"""Typed state values: what each kind of layer remembers, and the model's state made of them."""

from plait.state.kv import KV as KV
from plait.state.kv import KVBuffer as KVBuffer
from plait.state.kv import StaleState as StaleState
from plait.state.model_state import ModelState as ModelState
from plait.state.values import Branches as Branches
from plait.state.values import Nothing as Nothing
from plait.state.values import Recurrent as Recurrent
from plait.state.values import SlotState as SlotState
from plait.state.values import Window as Window
from plait.state.values import recurrent as recurrent
