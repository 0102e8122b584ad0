"""The ledger: one row a request, and their sums by hour and origin."""

import sqlalchemy as sa
from alembic import op

revision = "0001_ledger"
down_revision = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "requests",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("hour", sa.BigInteger, nullable=False),
        sa.Column("surface", sa.String(64), nullable=False),
        sa.Column("caller", sa.String(512), nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("user_name", sa.String(512), nullable=False),
        sa.Column("trust", sa.String(16), nullable=False),
        sa.Column("route", sa.String(128), nullable=False),
        sa.Column("model", sa.String(512), nullable=False),
        sa.Column("model_digest", sa.String(80), nullable=False),
        sa.Column("backend", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(32), nullable=False),
        sa.Column("status", sa.BigInteger, nullable=False),
        sa.Column("finish_reason", sa.String(32), nullable=False),
        sa.Column("error_code", sa.String(64), nullable=False),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("thinking_tokens", sa.BigInteger, nullable=False),
        sa.Column("truncated_tokens", sa.BigInteger, nullable=False),
        sa.Column("wasted_tokens", sa.BigInteger, nullable=False),
        sa.Column("draft_tokens", sa.BigInteger, nullable=False),
        sa.Column("accepted_tokens", sa.BigInteger, nullable=False),
        sa.Column("queue_s", sa.Double, nullable=False),
        sa.Column("load_s", sa.Double, nullable=False),
        sa.Column("prefill_s", sa.Double, nullable=False),
        sa.Column("decode_s", sa.Double, nullable=False),
        sa.Column("ttft_s", sa.Double, nullable=False),
        sa.Column("total_s", sa.Double, nullable=False),
    )
    op.create_index("ix_requests_started_at", "requests", ["started_at"])
    op.create_index("ix_requests_caller_started_at", "requests", ["caller", "started_at"])
    op.create_index("ix_requests_model_started_at", "requests", ["model", "started_at"])
    op.create_table(
        "usage_hourly",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("surface", sa.String(64), primary_key=True),
        sa.Column("caller", sa.String(512), primary_key=True),
        sa.Column("client", sa.String(64), primary_key=True),
        sa.Column("user_name", sa.String(512), primary_key=True),
        sa.Column("trust", sa.String(16), primary_key=True),
        sa.Column("model", sa.String(512), primary_key=True),
        sa.Column("num_requests", sa.BigInteger, nullable=False),
        sa.Column("num_errors", sa.BigInteger, nullable=False),
        sa.Column("num_ttft", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("thinking_tokens", sa.BigInteger, nullable=False),
        sa.Column("truncated_tokens", sa.BigInteger, nullable=False),
        sa.Column("wasted_tokens", sa.BigInteger, nullable=False),
        sa.Column("draft_tokens", sa.BigInteger, nullable=False),
        sa.Column("accepted_tokens", sa.BigInteger, nullable=False),
        sa.Column("queue_s", sa.Double, nullable=False),
        sa.Column("load_s", sa.Double, nullable=False),
        sa.Column("prefill_s", sa.Double, nullable=False),
        sa.Column("decode_s", sa.Double, nullable=False),
        sa.Column("ttft_s", sa.Double, nullable=False),
        sa.Column("total_s", sa.Double, nullable=False),
        sqlite_with_rowid=False,
    )
