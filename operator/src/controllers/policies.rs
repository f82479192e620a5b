//! Policies of a level against what the spec says. Pure.

use std::collections::BTreeSet;

use crate::crd::PolicyValues;

/// What is to change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Names that are ours, to be written down before new ones are set: a crash in between forgets none.
    pub(crate) note: Option<Vec<String>>,
    pub(crate) set: PolicyValues,
    pub(crate) unset: Vec<String>,
}

/// Fields that we set before and that have left the spec are un-set; what others set is left alone.
pub(crate) fn changes(wanted: &PolicyValues, managed: &[String], own: &PolicyValues) -> Changes {
    let managed: BTreeSet<&String> = managed.iter().collect();
    let names: BTreeSet<&String> = wanted.keys().collect();
    let set = wanted.iter().filter(|(name, value)| own.get(*name) != Some(*value));
    let unset = managed.difference(&names).filter(|name| own.contains_key(**name));
    let all = || managed.union(&names).map(|name| (*name).clone()).collect();
    Changes {
        note: (!names.is_subset(&managed)).then(all),
        set: set.map(|(name, value)| (name.clone(), *value)).collect(),
        unset: unset.map(|name| (*name).clone()).collect(),
    }
}
