//! Keys come back as they went in, and nothing escapes its part.

use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9._~-]{1,12}".prop_filter("dots are no name", |name| name != "." && name != "..")
}

fn any_key() -> impl Strategy<Value = (Key, ParsedKey)> {
    let topic = |name: &str| TopicName::parse(name).expect("valid");
    prop_oneof![
        any::<u64>().prop_map(|id| (ledger(LedgerId(id)), ParsedKey::Ledger(LedgerId(id)))),
        any::<u64>().prop_map(|id| (
            under_replicated(LedgerId(id)),
            ParsedKey::UnderReplicated(LedgerId(id))
        )),
        any::<u64>().prop_map(|id| (super::topic(TopicId(id)), ParsedKey::Topic(TopicId(id)))),
        (any::<u64>(), any::<u32>()).prop_map(|(id, segment)| {
            let segment = SegmentId { topic: TopicId(id), segment };
            (segment_list(segment), ParsedKey::SegmentList(segment))
        }),
        any::<u32>().prop_map(|id| (lost(Incarnation(id)), ParsedKey::Lost(Incarnation(id)))),
        any::<u32>().prop_map(|id| (owner(Bundle(id)), ParsedKey::Owner(Bundle(id)))),
        any::<String>().prop_map(|id| (cookie(&id), ParsedKey::Cookie(id))),
        any::<String>().prop_map(|id| (available(&id), ParsedKey::Available(id))),
        any::<String>().prop_map(|id| (broker(&id), ParsedKey::Broker(id))),
        any::<String>().prop_map(|id| (counter(&id), ParsedKey::Counter(id))),
        name().prop_map(|name| {
            let name = TenantName::parse(&name).expect("valid");
            (tenant(&name), ParsedKey::Tenant(name))
        }),
        (name(), name()).prop_map(|(a, b)| {
            let name = NamespaceName::parse(&format!("{a}/{b}")).expect("valid");
            (namespace(&name), ParsedKey::Namespace(name))
        }),
        (name(), name(), name()).prop_map(move |(a, b, c)| {
            let name = topic(&format!("{a}/{b}/{c}"));
            (topic_name(&name), ParsedKey::TopicName(name))
        }),
        (any::<u64>(), name()).prop_map(|(id, name)| {
            let name = SubscriptionName::parse(&name).expect("valid");
            (subscription(TopicId(id), &name), ParsedKey::Subscription(TopicId(id), name))
        }),
        Just((cluster(), ParsedKey::Cluster)),
    ]
}

proptest! {
    #[test]
    fn every_key_parses_back_to_what_it_was_made_of((key, parsed) in any_key()) {
        prop_assert_eq!(parse(&key), Some(parsed));
    }

    #[test]
    fn any_bytes_are_parsed_without_a_panic_and_only_canonically(bytes in "[a-z]{3,9}/[%0-9a-f/]{0,20}") {
        let key = Key(Bytes::from(bytes));
        if let Some(ParsedKey::Cookie(id)) = parse(&key) {
            prop_assert_eq!(cookie(&id), key);
        }
    }

    #[test]
    fn the_order_of_ledger_keys_is_the_order_of_ids(a: u64, b: u64) {
        prop_assert_eq!(a.cmp(&b), ledger(LedgerId(a)).cmp(&ledger(LedgerId(b))));
    }

    #[test]
    fn the_prefix_of_one_tenant_never_matches_the_key_of_another(a in name(), b in name(), c in name()) {
        prop_assume!(a != b);
        let other = NamespaceName::parse(&format!("{b}/{c}")).expect("valid");
        let a = TenantName::parse(&a).expect("valid");
        prop_assert!(!namespace(&other).0.starts_with(&namespaces_of(&a).0));
    }
}
