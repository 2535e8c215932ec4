"""Typed state values: what each kind of layer remembers, and the model's state made of them."""

from plait.state.kv import KV as KV
from plait.state.kv import Appended as Appended
from plait.state.kv import Buffer as Buffer
from plait.state.kv import Latent as Latent
from plait.state.kv import StaleState as StaleState
from plait.state.model_state import ModelState as ModelState
from plait.state.model_state import remember as remember
from plait.state.pool import Pages as Pages
from plait.state.pool import Pool as Pool
from plait.state.pool import PoolFull as PoolFull
from plait.state.pool import PoolRows as PoolRows
from plait.state.pool import Snapshot as Snapshot
from plait.state.values import Branches as Branches
from plait.state.values import Nothing as Nothing
from plait.state.values import Recurrent as Recurrent
from plait.state.values import Shifted as Shifted
from plait.state.values import SlotState as SlotState
from plait.state.values import State as State
from plait.state.values import Window as Window
from plait.state.values import recurrent as recurrent
