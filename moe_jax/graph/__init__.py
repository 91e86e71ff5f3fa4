"""The knowledge graph: a fixed-size memory that lives on the device."""

from moe_jax.graph.incoming import IncomingEdges as IncomingEdges
from moe_jax.graph.incoming import incoming_edges as incoming_edges
from moe_jax.graph.link import SEMANTIC as SEMANTIC
from moe_jax.graph.link import TEMPORAL as TEMPORAL
from moe_jax.graph.link import USER as USER
from moe_jax.graph.link import link as link
from moe_jax.graph.link import link_similar as link_similar
from moe_jax.graph.link_stream import StreamTail as StreamTail
from moe_jax.graph.link_stream import link_stream as link_stream
from moe_jax.graph.neighbours import Neighbours as Neighbours
from moe_jax.graph.neighbours import neighbours as neighbours
from moe_jax.graph.pagerank import pagerank as pagerank
from moe_jax.graph.paths import Path as Path
from moe_jax.graph.paths import Paths as Paths
from moe_jax.graph.paths import path_to as path_to
from moe_jax.graph.paths import shortest_paths as shortest_paths
from moe_jax.graph.query import Hits as Hits
from moe_jax.graph.query import search as search
from moe_jax.graph.retrieve import retrieve as retrieve
from moe_jax.graph.state import FOREVER as FOREVER
from moe_jax.graph.state import KnowledgeGraph as KnowledgeGraph
from moe_jax.graph.traverse import Reached as Reached
from moe_jax.graph.traverse import k_hop as k_hop
from moe_jax.graph.update import InsertInfo as InsertInfo
from moe_jax.graph.update import insert as insert
