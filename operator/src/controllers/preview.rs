//! What a controller would do with an object now, without doing it: reads and decides as a turn does, and stops there.

use geminga_runtime::{clock::SharedClock, random::Random};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};
use serde_json::Value;

use super::{
    context::{Address, Context, Error, Turns},
    cycle::{Controlled, Planned},
    marks::Marks,
};
use crate::{
    crd::{
        BookiePool, Condition, GemingaCluster, GemingaClusterSpec, GemingaConnection, StatusReport,
        Subscription, Tenant, Topic, TopicNamespace,
    },
    metrics::Metrics,
    server::SharedServers,
};

/// What would be done, and what the object's conditions would say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// In order, a sentence each.
    pub actions: Vec<String>,
    /// As it would be once all of them had succeeded.
    pub report: StatusReport,
}

/// Makes previews with somebody's own rights.
#[derive(Clone)]
pub struct Previewer(Context);

macro_rules! objects {
    ($($kind:ident),*) => {
        /// An object of any of our kinds.
        #[derive(Clone, Debug)]
        pub enum Object {
            $(
                #[doc = concat!("A ", stringify!($kind), ".")]
                $kind(Box<$kind>),
            )*
        }

        impl Object {
            /// Reads one; none: a kind that is not ours.
            ///
            /// # Errors
            /// A field that is missing, unknown to its type, or of another type.
            pub fn parse(kind: &str, object: Value) -> Result<Option<Self>, serde_json::Error> {
                Ok(match kind {
                    $(stringify!($kind) => Some(Self::$kind(serde_json::from_value(object)?)),)*
                    _ => None,
                })
            }

            /// As the API names it.
            #[must_use]
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$kind(_) => stringify!($kind),)* }
            }

            /// Name, namespace, generation, annotations.
            #[must_use]
            pub fn meta(&self) -> &ObjectMeta {
                match self { $(Self::$kind(object) => &object.metadata,)* }
            }

            /// What its status says.
            #[must_use]
            pub fn conditions(&self) -> &[Condition] {
                match self {
                    $(Self::$kind(object) => {
                        object.status.as_ref().map_or(&[], |status| &status.conditions)
                    })*
                }
            }
        }

        impl Previewer {
            /// Of one object, as it is or as it is to be. `cluster`: the spec of the pool's cluster in place of the stored one.
            ///
            /// # Errors
            /// What could not be read; a refusal of a Geminga server among them. Nothing was done.
            pub async fn preview(
                &self,
                object: &Object,
                cluster: Option<&GemingaClusterSpec>,
            ) -> Result<Preview, Error> {
                match object {
                    Object::BookiePool(pool) => {
                        let marks = Marks::of(&pool.metadata);
                        Ok(pool.plan_in(cluster, &marks, &self.0).await?.into())
                    }
                    $(
                        #[allow(unreachable_patterns, reason = "pools have their own arm")]
                        Object::$kind(object) => {
                            let marks = Marks::of(&object.metadata);
                            Ok(object.plan(&marks, &self.0).await?.into())
                        }
                    )*
                }
            }
        }
    };
}

objects!(
    GemingaCluster,
    BookiePool,
    GemingaConnection,
    Tenant,
    TopicNamespace,
    Topic,
    Subscription
);

impl<A: std::fmt::Display, S> From<Planned<A, S>> for Preview {
    fn from(planned: Planned<A, S>) -> Self {
        let actions = planned.actions.iter().map(ToString::to_string).collect();
        Self { actions, report: planned.report }
    }
}

impl Previewer {
    /// Reads by `client`, and asks the servers that `address` and the objects name.
    #[must_use]
    pub fn new(
        client: Client,
        servers: SharedServers,
        address: Address,
        clock: SharedClock,
    ) -> Self {
        let reporter = Reporter { controller: "geminga-preview".into(), instance: None };
        let recorder = Recorder::new(client.clone(), reporter); // nothing is ever told
        let metrics = Metrics::default();
        let resync = std::time::Duration::MAX;
        let (random, turns) = (Random::from_os(), Turns::default());
        Self(Context { client, servers, address, clock, random, turns, recorder, metrics, resync })
    }
}
