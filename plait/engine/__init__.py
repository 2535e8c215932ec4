"""Generation: prompts in, continuations out."""

from plait.engine.chat import Chat as Chat
from plait.engine.decode import Decoding as Decoding
from plait.engine.decode import generate_tokens as generate_tokens
from plait.engine.sampling import Sampling as Sampling
from plait.engine.text import generate as generate
from plait.engine.text import stream as stream
