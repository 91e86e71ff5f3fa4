"""The knowledge graph: a fixed-size memory that lives on the device."""

from moe_jax.graph.digest import digest as digest
from moe_jax.graph.digest import digest_hex as digest_hex
from moe_jax.graph.digest import row_digest as row_digest
from moe_jax.graph.health import GraphHealth as GraphHealth
from moe_jax.graph.health import health as health
from moe_jax.graph.link import link as link
from moe_jax.graph.link import link_similar as link_similar
from moe_jax.graph.query import Hits as Hits
from moe_jax.graph.query import Neighbours as Neighbours
from moe_jax.graph.query import neighbours as neighbours
from moe_jax.graph.query import search as search
from moe_jax.graph.state import FOREVER as FOREVER
from moe_jax.graph.state import KnowledgeGraph as KnowledgeGraph
from moe_jax.graph.update import InsertInfo as InsertInfo
from moe_jax.graph.update import insert as insert
