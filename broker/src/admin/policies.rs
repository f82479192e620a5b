//! Policies of the cluster, a tenant, a namespace, a topic.

use geminga_proto::admin::v1::{GetPoliciesRequest, PoliciesResponse, SetPoliciesRequest};

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
        own: Some(effective.own),
        effective: Some(effective.policies),
        sources: sources.collect(),
    }
}
