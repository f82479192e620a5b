//! Policies of the cluster, a namespace, a topic.

use geminga_proto::{
    admin::v1::{GetPoliciesRequest, Policies, PoliciesResponse, SetPoliciesRequest},
    storage::v1 as storage,
};

use crate::{
    catalog::{Effective, PolicyChange, Scope},
    context::Context,
    errors::Refusal,
};

pub(super) async fn get(
    context: &Context,
    request: &GetPoliciesRequest,
) -> Result<PoliciesResponse, Refusal> {
    Ok(described(&context.catalog.policies(&Scope::parse(&request.scope)?).await?))
}

pub(super) async fn set(
    context: &Context,
    request: &SetPoliciesRequest,
) -> Result<PoliciesResponse, Refusal> {
    let scope = Scope::parse(&request.scope)?;
    let set = request.policies.unwrap_or_default();
    let set = storage::Policies {
        offload_after_ms: set.offload_after_ms,
        offload_above_bytes: set.offload_above_bytes,
        delete_lag_ms: set.delete_lag_ms,
        retention_ms: set.retention_ms,
        retention_bytes: set.retention_bytes,
        ttl_ms: set.ttl_ms,
        backlog_quota_bytes: set.backlog_quota_bytes,
        backlog_quota_ms: set.backlog_quota_ms,
        backlog_action: set.backlog_action,
    };
    let change = PolicyChange::new(set, &request.unset)?;
    context.catalog.change_policies(&scope, &change).await?;
    Ok(described(&context.catalog.policies(&scope).await?))
}

fn described(effective: &Effective) -> PoliciesResponse {
    let sources = effective.sources.iter().map(|(field, level)| {
        let (field, level): (String, String) = ((*field).into(), (*level).into());
        (field, level)
    });
    PoliciesResponse {
        own: Some(policies(&effective.own)),
        effective: Some(policies(&effective.policies)),
        sources: sources.collect(),
    }
}

fn policies(stored: &storage::Policies) -> Policies {
    Policies {
        offload_after_ms: stored.offload_after_ms,
        offload_above_bytes: stored.offload_above_bytes,
        delete_lag_ms: stored.delete_lag_ms,
        retention_ms: stored.retention_ms,
        retention_bytes: stored.retention_bytes,
        ttl_ms: stored.ttl_ms,
        backlog_quota_bytes: stored.backlog_quota_bytes,
        backlog_quota_ms: stored.backlog_quota_ms,
        backlog_action: stored.backlog_action,
    }
}
