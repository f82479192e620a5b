//! Connections: who answers at the addresses.

use std::fmt;

use super::{
    context::{Context, Error},
    cycle::{Controlled, Planned},
    marks::Marks,
};
use crate::crd::{GemingaConnection, GemingaConnectionStatus, Reason, StatusReport};

/// Nothing is ever done to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nothing {}

impl fmt::Display for Nothing {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

impl Controlled for GemingaConnection {
    type Status = GemingaConnectionStatus;
    type Action = Nothing;

    fn before(&self) -> GemingaConnectionStatus {
        self.status.clone().unwrap_or_default()
    }

    async fn plan(
        &self,
        marks: &Marks,
        context: &Context,
    ) -> Result<Planned<Nothing, GemingaConnectionStatus>, Error> {
        let mut status = self.before();
        let report = if marks.paused {
            StatusReport::idle(Reason::Paused, "geminga.io/paused is set")
        } else {
            let server = context.servers.connect(&self.spec.servers.join(",")).await;
            let asked = match server {
                Ok(server) => server.cluster().await,
                Err(error) => Err(error),
            };
            match asked {
                Ok(facts) => {
                    status.cluster_id = Some(facts.id);
                    StatusReport::ready()
                }
                Err(error) => Error::from(error).report(),
            }
        };
        Ok(Planned { actions: Vec::new(), status, report })
    }

    async fn apply(
        &self,
        action: &Nothing,
        _so_far: &mut GemingaConnectionStatus,
        _context: &Context,
    ) -> Result<(), Error> {
        match *action {}
    }
}
