//! Objects of a file, as they would be once it was applied: the API server fills in defaults and checks its rules in a dry
//! run; status and finalizers are those of what is live.

use std::{io::Read, path::Path};

use geminga_operator::controllers::preview::Object;
use kube::{
    Api,
    api::{DynamicObject, PostParams},
};
use serde_json::{Value, json};

use super::{Subject, dynamic, parsed};
use crate::cli::{
    exit::{Code, Failure},
    kube::access::{Access, all, failure, kind_of, words},
    output,
};

/// Largest file that is read, bytes.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The file's objects; after a cluster its live pools that the file does not name, since they follow its spec.
pub(super) async fn subjects(file: &Path, access: &Access) -> Result<Vec<Subject>, Failure> {
    let mut objects = Vec::new();
    for document in documents(file)? {
        objects.extend(as_applied(document, access).await?);
    }
    if objects.is_empty() {
        let words = format!("{}: there is no object of ours", file.display());
        return Err(Failure::new(Code::Usage, words, "kubectl explain gemingacluster"));
    }
    let live = followers(&objects, access).await?;
    let clusters = objects.clone();
    let with_cluster = |object: Object| {
        let cluster = cluster_of(&object, &clusters);
        Subject { object, cluster }
    };
    Ok(objects.into_iter().chain(live).map(with_cluster).collect())
}

fn documents(file: &Path) -> Result<Vec<Value>, Failure> {
    let unusable = |error: &dyn std::fmt::Display| {
        let words = format!("{}: {error}", file.display());
        Failure::new(Code::Usage, words, "geminga kube plan --help")
    };
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(FILE_BYTES_MAX + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(file)
            .and_then(|open| open.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
    };
    let bytes = read.map_err(|error| unusable(&error))?;
    if bytes as u64 > FILE_BYTES_MAX {
        return Err(unusable(&"it is too large"));
    }
    let found: Vec<Value> = serde_saphyr::from_multiple(&text).map_err(|error| unusable(&error))?;
    Ok(found.into_iter().filter(|document| !document.is_null()).collect())
}

/// One document as it would be stored; none: not of our kinds.
async fn as_applied(mut document: Value, access: &Access) -> Result<Option<Object>, Failure> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&document["kind"]), text(&document["metadata"]["name"]));
    let ours = text(&document["apiVersion"]).starts_with("geminga.io/");
    let Some(resource) = kind_of(&kind).filter(|_| ours) else {
        output::note(&format!("{kind} {name} is not of our kinds and left out"));
        return Ok(None);
    };
    if name.is_empty() {
        let words = format!("a {kind} has no metadata.name");
        return Err(Failure::usage(words, "kube plan"));
    }
    let namespace = match document["metadata"]["namespace"].as_str() {
        Some(namespace) => namespace.to_owned(),
        None => access.namespace.clone(),
    };
    document["metadata"]["namespace"] = json!(namespace);
    let api = dynamic(access, &resource, &namespace);
    let live = api.get_opt(&name).await.map_err(|error| failure(&error))?;
    let wished = merged(document, live.as_ref().map(|live| json!(live)));
    parsed(&resource.kind, checked(&api, &name, wished, live.is_some()).await?)
}

/// The file's spec, labels and annotations on what is live.
fn merged(document: Value, live: Option<Value>) -> Value {
    let Some(mut object) = live else { return document };
    object["spec"] = document["spec"].clone();
    for part in ["labels", "annotations"] {
        let words = document["metadata"][part].as_object().into_iter().flatten();
        for (name, value) in words {
            object["metadata"][part][name] = value.clone();
        }
    }
    object
}

/// What the API server makes of it without storing it. Where this user may only read, it is taken as it is.
async fn checked(
    api: &Api<DynamicObject>,
    name: &str,
    object: Value,
    exists: bool,
) -> Result<Value, Failure> {
    let parse = |object: &Value| {
        serde_json::from_value::<DynamicObject>(object.clone())
            .map_err(|error| Failure::usage(format!("{name}: {error}"), "kube plan"))
    };
    let wished = parse(&object)?;
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let done = if exists {
        api.replace(name, &params, &wished).await
    } else {
        api.create(&params, &wished).await
    };
    match done {
        Ok(stored) => Ok(json!(stored)),
        Err(kube::Error::Api(status)) if status.is_forbidden() => {
            output::note(&format!("{name} is not checked by the API server: {}", status.message));
            Ok(object)
        }
        Err(error @ kube::Error::Api(_)) => {
            let words = format!("the API server would refuse it: {}", words(&error));
            Err(Failure::new(Code::Refused, words, "kubectl explain bookiepool.spec"))
        }
        Err(error) => Err(failure(&error)),
    }
}

/// Live pools of the file's clusters that the file does not name.
async fn followers(objects: &[Object], access: &Access) -> Result<Vec<Object>, Failure> {
    let mut found = Vec::new();
    let Some(resource) = kind_of("bookiepool") else { return Ok(found) };
    let key = |object: &Object| {
        let meta = object.meta();
        (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    };
    let named: Vec<_> =
        objects.iter().filter(|object| matches!(object, Object::BookiePool(_))).map(key).collect();
    for cluster in objects.iter().filter(|object| matches!(object, Object::GemingaCluster(_))) {
        let (namespace, name) = key(cluster);
        let api = dynamic(access, &resource, &namespace);
        for pool in all(&api, "").await.map_err(|error| failure(&error))? {
            let Some(object) = parsed("BookiePool", json!(pool))? else { continue };
            let follows = matches!(&object, Object::BookiePool(pool) if pool.spec.cluster == name);
            if follows && !named.contains(&key(&object)) {
                found.push(object);
            }
        }
    }
    Ok(found)
}

/// The file's cluster that a pool belongs to.
fn cluster_of(
    object: &Object,
    file: &[Object],
) -> Option<geminga_operator::crd::GemingaClusterSpec> {
    let Object::BookiePool(pool) = object else { return None };
    file.iter().find_map(|other| match other {
        Object::GemingaCluster(cluster)
            if cluster.metadata.name.as_ref() == Some(&pool.spec.cluster)
                && cluster.metadata.namespace == pool.metadata.namespace =>
        {
            Some(cluster.spec.clone())
        }
        _ => None,
    })
}
