use std::sync::Arc;

use geminga_metadata::MemoryStore;
use geminga_proto::names::{NamespaceName, SubscriptionName, TenantName, TopicName};
use geminga_runtime::clock::{ManualClock, Timestamp};

use super::*;

fn catalog() -> Catalog {
    let cluster =
        Cluster { id: "c".into(), bundles: 64, generation: 2, confirmed: 2, feature_level: 1 };
    let list = |segment| Op::put(keys::segment_list(segment), "empty");
    let clock = Arc::new(ManualClock::new(Timestamp(1_000)));
    Catalog::new(Arc::new(MemoryStore::new()), clock, cluster, list, CancellationToken::new())
}

fn tenant(name: &str) -> TenantName {
    TenantName::parse(name).expect("valid")
}

fn namespace(name: &str) -> NamespaceName {
    NamespaceName::parse(name).expect("valid")
}

fn topic(name: &str) -> TopicName {
    TopicName::parse(name).expect("valid")
}

fn sub(name: &str) -> SubscriptionName {
    SubscriptionName::parse(name).expect("valid")
}

async fn with_namespace() -> Catalog {
    let catalog = catalog();
    catalog.create_tenant(&tenant("a")).await.expect("created");
    catalog.create_namespace(&namespace("a/b"), None).await.expect("created");
    catalog
}

fn reason<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Reason {
    result.expect_err("refused").reason
}

#[tokio::test(start_paused = true)]
async fn containers_come_before_what_they_hold_and_go_after_it() {
    let catalog = catalog();
    assert_eq!(
        reason(catalog.create_namespace(&namespace("a/b"), None).await),
        Reason::TenantNotFound
    );
    catalog.create_tenant(&tenant("a")).await.expect("created");
    assert_eq!(reason(catalog.create_topic(&topic("a/b/c"), 1).await), Reason::NamespaceNotFound);
    catalog.create_namespace(&namespace("a/b"), None).await.expect("created");
    catalog.create_topic(&topic("a/b/c"), 1).await.expect("created");
    assert_eq!(reason(catalog.delete_tenant(&tenant("a")).await), Reason::NotEmpty);
    assert_eq!(reason(catalog.delete_namespace(&namespace("a/b")).await), Reason::NotEmpty);
    let found = catalog.topic(&topic("a/b/c")).await.expect("found");
    catalog.mark_topic_deleting(&found).await.expect("marked");
    assert_eq!(reason(catalog.topic(&topic("a/b/c")).await), Reason::TopicNotFound);
    assert_eq!(reason(catalog.create_topic(&topic("a/b/c"), 1).await), Reason::AlreadyExists);
    catalog.remove_topic(&found).await.expect("removed");
    catalog.delete_namespace(&namespace("a/b")).await.expect("deleted");
    assert_eq!(
        reason(catalog.delete_namespace(&namespace("a/b")).await),
        Reason::NamespaceNotFound
    );
    catalog.delete_tenant(&tenant("a")).await.expect("deleted");
    assert_eq!(reason(catalog.delete_tenant(&tenant("a")).await), Reason::TenantNotFound);
}

#[tokio::test(start_paused = true)]
async fn creating_twice_is_the_same_and_with_other_parameters_refused() {
    let catalog = with_namespace().await;
    let first = catalog.create_topic(&topic("a/b/c"), 4).await.expect("created");
    assert_eq!(catalog.create_topic(&topic("a/b/c"), 4).await.expect("the same"), first);
    assert_eq!(reason(catalog.create_topic(&topic("a/b/c"), 5).await), Reason::AlreadyExists);
    catalog.create_namespace(&namespace("a/b"), Some(false)).await.expect("the same");
    assert_eq!(
        reason(catalog.create_namespace(&namespace("a/b"), Some(true)).await),
        Reason::AlreadyExists
    );
    let one = catalog
        .begin_subscription(&first, &sub("s"), (Start::Latest, false), None)
        .await
        .expect("made");
    assert_eq!(one.state, State::Creating);
    let again = catalog.begin_subscription(&first, &sub("s"), (Start::Earliest, true), None).await;
    assert_eq!(again.expect("any start"), one);
    let other = catalog.begin_subscription(&first, &sub("s"), (Start::Earliest, false), None).await;
    assert_eq!(reason(other), Reason::AlreadyExists);
}

#[tokio::test(start_paused = true)]
async fn a_topic_of_the_most_segments_is_one_transaction_and_covers_every_hash() {
    let catalog = with_namespace().await;
    let made = catalog.create_topic(&topic("a/b/c"), 100).await.expect("created");
    assert_eq!(made.segments.len(), 100);
    for hash in [0, 1, u32::MAX / 2, u32::MAX] {
        let range = made.segments[made.segment_of(hash) as usize];
        assert!(range.first <= hash && hash <= range.last);
    }
    assert_eq!(made.id.0 >> 56, 2, "ids carry the generation");
    let lists = catalog.count(keys::segment_lists_of(made.id)).await.expect("counted");
    assert_eq!(lists, 100);
}

#[tokio::test(start_paused = true)]
async fn ids_are_never_reused_for_the_same_name() {
    let catalog = with_namespace().await;
    let first = catalog.create_topic(&topic("a/b/c"), 1).await.expect("created");
    catalog.mark_topic_deleting(&first).await.expect("marked");
    catalog.remove_topic(&first).await.expect("removed");
    let second = catalog.create_topic(&topic("a/b/c"), 1).await.expect("created");
    assert!(second.id > first.id);
}

#[tokio::test(start_paused = true)]
async fn listings_come_in_pages_that_leave_nothing_out() {
    let catalog = with_namespace().await;
    let names: Vec<_> = (10..33).map(|i| topic(&format!("a/b/t{i}"))).collect();
    for name in &names {
        catalog.create_topic(name, 1).await.expect("created");
    }
    let (mut seen, mut page) = (Vec::new(), PageRequest { size: 7, token: String::new() });
    loop {
        let listing = catalog.topics(&namespace("a/b"), &page).await.expect("listed");
        assert!(listing.items.len() <= 7);
        seen.extend(listing.items.into_iter().map(|topic| topic.name));
        if listing.next_page_token.is_empty() {
            break;
        }
        page.token = listing.next_page_token;
    }
    assert_eq!(seen, names);
    let foreign = PageRequest { size: 7, token: "x/y/z".into() };
    assert_eq!(reason(catalog.topics(&namespace("a/b"), &foreign).await), Reason::InvalidRequest);
}

#[tokio::test(start_paused = true)]
async fn a_subscription_is_ready_only_if_the_layout_is_the_one_its_cursors_were_made_for() {
    let catalog = with_namespace().await;
    let made = catalog.create_topic(&topic("a/b/c"), 1).await.expect("created");
    let sub_s = catalog
        .begin_subscription(&made, &sub("s"), (Start::Latest, false), None)
        .await
        .expect("made");
    catalog.mark_topic_deleting(&made).await.expect("marked");
    assert!(!catalog.subscription_ready(&made, &sub_s).await.expect("answered"));
    let late = catalog.begin_subscription(&made, &sub("t"), (Start::Latest, false), None).await;
    assert_eq!(reason(late), Reason::TopicNotFound);
}

#[tokio::test(start_paused = true)]
async fn a_subscription_being_deleted_is_not_found_and_its_key_goes_last() {
    let catalog = with_namespace().await;
    let made = catalog.create_topic(&topic("a/b/c"), 1).await.expect("created");
    let begun = catalog
        .begin_subscription(&made, &sub("s"), (Start::Latest, false), None)
        .await
        .expect("made");
    assert!(catalog.subscription_ready(&made, &begun).await.expect("answered"));
    let marked = catalog
        .mark_subscription_deleting(made.id, &sub("s"))
        .await
        .expect("marked")
        .expect("there");
    assert_eq!(reason(catalog.subscription(&made, &sub("s")).await), Reason::SubscriptionNotFound);
    catalog.remove_subscription(&marked).await.expect("removed");
    assert_eq!(catalog.find_subscription(made.id, &sub("s")).await.expect("read"), None);
    assert_eq!(catalog.mark_subscription_deleting(made.id, &sub("s")).await.expect("read"), None);
}
