"""The model: front, residual stack, head; its weights, losses, files and surgery."""

from plait.model.build import build as build
from plait.model.build import init_weights as init_weights
from plait.model.files import model_folder as model_folder
from plait.model.files import save as save
from plait.model.language_model import LanguageModel as LanguageModel
from plait.model.listening import checking as checking
from plait.model.listening import listening as listening
from plait.model.lora import merge as merge
from plait.model.loss import KL as KL
from plait.model.loss import CrossEntropy as CrossEntropy
from plait.model.loss import Loss as Loss
from plait.model.loss import Mixed as Mixed
from plait.model.loss import SquaredError as SquaredError
from plait.model.objective import Distillation as Distillation
from plait.model.objective import NextToken as NextToken
from plait.model.objective import Objective as Objective
from plait.model.objective import Regression as Regression
from plait.model.objective import token_loss as token_loss
from plait.model.surgery import swap as swap
