"""The language model: residual stack, weights, loss, files."""

from plait.model.build import build as build
from plait.model.files import load as load
from plait.model.files import model_folder as model_folder
from plait.model.files import save as save
from plait.model.language_model import LanguageModel as LanguageModel
from plait.model.loss import token_loss as token_loss
