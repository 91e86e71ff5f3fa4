"""Routing: logits to choices, choices to slots, tokens to expert buffers and back."""

from moe_jax.routing.choice import Choices as Choices
from moe_jax.routing.choice import balanced_bias as balanced_bias
from moe_jax.routing.choice import dense as dense
from moe_jax.routing.choice import noisy_topk as noisy_topk
from moe_jax.routing.choice import topk as topk
from moe_jax.routing.dispatch import DispatchIndex as DispatchIndex
from moe_jax.routing.dispatch import ExpertInputs as ExpertInputs
from moe_jax.routing.dispatch import combine as combine
from moe_jax.routing.dispatch import dispatch as dispatch
from moe_jax.routing.dispatch import dispatch_index as dispatch_index
from moe_jax.routing.dispatch import gather_choices as gather_choices
from moe_jax.routing.losses import RoutingStats as RoutingStats
from moe_jax.routing.losses import router_z_loss as router_z_loss
from moe_jax.routing.losses import routing_stats as routing_stats
from moe_jax.routing.losses import switch_balance_loss as switch_balance_loss
from moe_jax.routing.losses import usage_mse_loss as usage_mse_loss
from moe_jax.routing.plan import RoutingPlan as RoutingPlan
from moe_jax.routing.plan import expert_capacity as expert_capacity
from moe_jax.routing.plan import make_plan as make_plan
from moe_jax.routing.rows import RowIndex as RowIndex
from moe_jax.routing.rows import combine_rows as combine_rows
from moe_jax.routing.rows import dispatch_rows as dispatch_rows
from moe_jax.routing.rows import row_index as row_index
