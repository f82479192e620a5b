//! Who may do what. One function checks, one table says what each request needs (security S1).
//!
//! Every handler calls [`Gate::check`] with its request before it does anything else. Allow-all stands behind the trait
//! for now: principals, actions and resources are in place, identities come later.

mod table;

use std::{fmt, sync::Arc};

use geminga_proto::{
    names::{NamespaceName, SubscriptionName, TenantName, TopicName},
    reason::Reason,
};

use crate::errors::Refusal;

pub use table::Authorized;

/// Who calls. A relayed call carries the original principal (S2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// No credential was shown.
    Anonymous,
    /// The broker itself, on its own behalf.
    Broker,
}

impl Principal {
    /// The principal that a relayed request names. A broker acts for itself on its own connection, never through a relay.
    #[must_use]
    pub fn relayed_name(name: &str) -> Option<Self> {
        (name == Self::Anonymous.to_string()).then_some(Self::Anonymous)
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous",
            Self::Broker => "broker",
        })
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    Publish,
    Consume,
    Lookup,
    Create,
    List,
    Describe,
    Delete,
    /// Change the policies of it.
    Configure,
    /// Drain it, or start work on it.
    Operate,
    /// Act as a broker of the cluster: ask owners about segments, pass requests on for others. Grants nothing else (S2).
    Serve,
}

/// What it is done to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    Cluster,
    Tenant(TenantName),
    Namespace(NamespaceName),
    Topic(TopicName),
    Subscription(TopicName, SubscriptionName),
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster => f.write_str("the cluster"),
            Self::Tenant(name) => write!(f, "tenant {name}"),
            Self::Namespace(name) => write!(f, "namespace {name}"),
            Self::Topic(name) => write!(f, "topic {name}"),
            Self::Subscription(topic, name) => write!(f, "subscription {name} of {topic}"),
        }
    }
}

/// Decides. It is asked with parsed names only.
pub trait Authorizer: Send + Sync + fmt::Debug + 'static {
    /// Whether `principal` may do `action` to `resource`.
    fn allows(&self, principal: &Principal, action: Action, resource: &Resource) -> bool;
}

/// Lets everybody do everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllowAll;

impl Authorizer for AllowAll {
    fn allows(&self, _: &Principal, _: Action, _: &Resource) -> bool {
        true
    }
}

/// The one way in.
#[derive(Clone, Debug)]
pub struct Gate(Arc<dyn Authorizer>);

impl Gate {
    /// A gate before this authorizer.
    #[must_use]
    pub fn new(authorizer: Arc<dyn Authorizer>) -> Self {
        Self(authorizer)
    }

    /// Checks every permission that the request needs.
    ///
    /// # Errors
    /// INVALID_NAME for names that cannot exist, PERMISSION_DENIED with the missing permission.
    pub fn check<R: Authorized>(&self, principal: &Principal, request: &R) -> Result<(), Refusal> {
        self.check_all(principal, request.needs()?)
    }

    /// Whether a connection may carry requests for others (S2).
    ///
    /// # Errors
    /// PERMISSION_DENIED.
    pub fn check_relay(&self, caller: &Principal) -> Result<(), Refusal> {
        self.check_all(caller, vec![(Action::Serve, Resource::Cluster)])
    }

    fn check_all(
        &self,
        principal: &Principal,
        needs: Vec<(Action, Resource)>,
    ) -> Result<(), Refusal> {
        for (action, resource) in needs {
            if !self.0.allows(principal, action, &resource) {
                let message = format!("{principal} may not {action:?} on {resource}");
                return Err(Refusal::new(Reason::PermissionDenied, message)
                    .with("action", format!("{action:?}"))
                    .with("resource", resource));
            }
        }
        Ok(())
    }
}
