"""Conversations and what becomes of them before a model sees them: files, renderers, datums, batches."""

from tinsmith.data.answers import ParsedAnswer
from tinsmith.data.batches import BatchPlan, epoch_order, hold_out
from tinsmith.data.choice import RENDERERS, choose_renderer, make_renderer
from tinsmith.data.conversations import Conversation, Image, Message, Role, Tool, ToolCall
from tinsmith.data.dataset import ConversationDataset, TooLong, build_dataset
from tinsmith.data.datum import to_datum
from tinsmith.data.demo import DEMO_CONVERSATIONS
from tinsmith.data.errors import DataError, RenderError
from tinsmith.data.jsonl import ConversationFile, read_conversations
from tinsmith.data.records import conversation_from_record
from tinsmith.data.renderer import ChatTemplateRenderer
from tinsmith.data.rendering import RenderedConversation, Renderer, SegmentRenderer, TrainOn
from tinsmith.data.tables import load_hub_conversations, table_conversations
from tinsmith.data.tokenizers import ChatTokenizer, load_tokenizer
from tinsmith.data.trajectories import Trajectory, read_trajectories

__all__ = [
    "DEMO_CONVERSATIONS",
    "RENDERERS",
    "BatchPlan",
    "ChatTemplateRenderer",
    "ChatTokenizer",
    "Conversation",
    "ConversationDataset",
    "ConversationFile",
    "DataError",
    "Image",
    "Message",
    "ParsedAnswer",
    "RenderError",
    "RenderedConversation",
    "Renderer",
    "Role",
    "SegmentRenderer",
    "TooLong",
    "Tool",
    "ToolCall",
    "TrainOn",
    "Trajectory",
    "build_dataset",
    "choose_renderer",
    "conversation_from_record",
    "epoch_order",
    "hold_out",
    "load_hub_conversations",
    "load_tokenizer",
    "make_renderer",
    "read_conversations",
    "read_trajectories",
    "table_conversations",
    "to_datum",
]
