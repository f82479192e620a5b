//! What is on the wire stays: the packages as they are now, compared with `proto/baseline.txt`, one line a thing.
//!
//! - Something removed, renamed, renumbered or retyped fails, and nothing updates the baseline for it.
//! - Something new fails until the baseline has it, so that every change of the contract is seen in a diff:
//!   `UPDATE_DOCS=1 cargo test --workspace --test compatibility`.

use std::{collections::BTreeMap, fmt::Write as _};

use geminga_proto::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/baseline.txt");

/// Thing by thing: its kind and full name, and what of it is on the wire.
type Surface = BTreeMap<String, String>;

/// The surface of a set of files.
fn surface(files: &FileDescriptorSet) -> Surface {
    let mut surface = Surface::new();
    for file in &files.file {
        let package = file.package();
        for message in &file.message_type {
            add_message(&mut surface, package, message);
        }
        for values in &file.enum_type {
            add_enum(&mut surface, package, values);
        }
        for service in &file.service {
            add_service(&mut surface, package, service);
        }
    }
    surface
}

fn add_message(surface: &mut Surface, parent: &str, message: &DescriptorProto) {
    let name = format!("{parent}.{}", message.name());
    surface.insert(format!("message {name}"), String::new());
    for field in &message.field {
        surface.insert(format!("field {name}.{}", field.name()), field_text(message, field));
    }
    // What was given up is never given to something else.
    for range in &message.reserved_range {
        surface
            .insert(format!("reserved {name} {}..{}", range.start(), range.end()), String::new());
    }
    for values in &message.enum_type {
        add_enum(surface, &name, values);
    }
    for nested in &message.nested_type {
        add_message(surface, &name, nested);
    }
}

/// Number, label and type; the oneof it is in.
fn field_text(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let mut text = format!("= {}", field.number());
    if field.label() == Label::Repeated {
        text += " repeated";
    } else if field.proto3_optional() {
        text += " optional";
    }
    match field.r#type() {
        Type::Message | Type::Enum => {
            let _ = write!(text, " {}", field.type_name().trim_start_matches('.'));
        }
        scalar => {
            let _ = write!(
                text,
                " {}",
                scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase()
            );
        }
    }
    // An `optional` field is in a oneof of its own, which is nothing but how it is written down.
    if let Some(index) = field.oneof_index.filter(|_| !field.proto3_optional()) {
        let _ = write!(text, " oneof {}", message.oneof_decl[index as usize].name());
    }
    text
}

fn add_enum(surface: &mut Surface, parent: &str, values: &EnumDescriptorProto) {
    let name = format!("{parent}.{}", values.name());
    surface.insert(format!("enum {name}"), String::new());
    for value in &values.value {
        surface.insert(format!("value {name}.{}", value.name()), format!("= {}", value.number()));
    }
}

fn add_service(surface: &mut Surface, package: &str, service: &ServiceDescriptorProto) {
    let name = format!("{package}.{}", service.name());
    surface.insert(format!("service {name}"), String::new());
    for rpc in &service.method {
        let stream = |streams: bool| if streams { "stream " } else { "" };
        let text = format!(
            "({}{}) returns ({}{})",
            stream(rpc.client_streaming()),
            rpc.input_type().trim_start_matches('.'),
            stream(rpc.server_streaming()),
            rpc.output_type().trim_start_matches('.')
        );
        surface.insert(format!("rpc {name}.{}", rpc.name()), text);
    }
}

const HEAD: &str = "\
# The packages geminga.v1, geminga.admin.v1, geminga.internal.v1 and geminga.storage.v1, one line a thing.
# Additions: UPDATE_DOCS=1 cargo test --workspace --test compatibility
# What stands here is never removed, renamed, renumbered or retyped: clients, brokers of another version and stored bytes know it.
";

/// The baseline's text: a line is `kind name` or `kind name text`, and `text` begins with `=` or `(`.
fn print(surface: &Surface) -> String {
    let mut page = HEAD.to_owned();
    for (thing, text) in surface {
        page += format!("{thing} {text}").trim_end();
        page.push('\n');
    }
    page
}

fn parse(page: &str) -> Surface {
    let lines = page.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    lines
        .map(|line| match line.find(" = ").or_else(|| line.find(" (")) {
            Some(end) => (line[..end].to_owned(), line[end + 1..].to_owned()),
            None => (line.to_owned(), String::new()),
        })
        .collect()
}

/// What of `before` does not hold any more, in words, each with what to do.
fn breaks(before: &Surface, now: &Surface) -> Vec<String> {
    let broken = before.iter().filter(|(thing, text)| now.get(*thing) != Some(text));
    broken
        .map(|(thing, text)| match now.get(thing) {
            None => format!(
                "{thing} {text}: is gone. Put it back (mark it deprecated in a comment), or add another beside it."
            ),
            Some(other) => format!(
                "{thing}: was `{text}`, is `{other}`. Put it back, and give the new form a new name and a new number."
            ),
        })
        .collect()
}

/// What `now` has beside `before`.
fn additions(before: &Surface, now: &Surface) -> Vec<String> {
    let new = now.iter().filter(|(thing, _)| !before.contains_key(*thing));
    new.map(|(thing, text)| format!("{thing} {text}")).collect()
}

#[test]
fn nothing_of_the_contract_changed_unseen() {
    let files = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("made by the build");
    let now = surface(&files);
    let before = std::fs::read_to_string(BASELINE).map(|page| parse(&page)).unwrap_or_default();
    let broken = breaks(&before, &now);
    assert!(
        broken.is_empty(),
        "the .proto files break the contract in proto/baseline.txt:\n  {}\n\
         UPDATE_DOCS=1 does not accept this. If it was never in a release and no stored bytes have it, remove its line \
         from proto/baseline.txt by hand and say why in the commit.",
        broken.join("\n  ")
    );
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(BASELINE, print(&now)).expect("the baseline can be written");
        return;
    }
    let new = additions(&before, &now);
    assert!(
        new.is_empty(),
        "the .proto files have more than proto/baseline.txt:\n  {}\n\
         If that is meant, run UPDATE_DOCS=1 cargo test --workspace --test compatibility, and commit the baseline.",
        new.join("\n  ")
    );
}

#[test]
fn the_baseline_reads_back_as_it_was_printed() {
    let files = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("made by the build");
    let now = surface(&files);
    assert_eq!(parse(&print(&now)), now);
    for package in ["geminga.v1", "geminga.admin.v1", "geminga.internal.v1", "geminga.storage.v1"] {
        let of_package = format!("message {package}.");
        assert!(now.keys().any(|thing| thing.starts_with(&of_package)), "{package} is looked at");
    }
    assert_eq!(
        now["field geminga.v1.OpenConsume.create_at"],
        "= 7 optional geminga.v1.SubscriptionStart"
    );
    assert_eq!(now["field geminga.v1.Settle.accept"], "= 2 geminga.v1.Accept oneof verb");
}

#[test]
fn each_kind_of_break_is_seen_and_an_addition_is_none() {
    let files = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("made by the build");
    let before = surface(&files);
    type Change = fn(&mut FileDescriptorSet);
    let changes: [(&str, Change); 7] = [
        ("field geminga.v1.MessageId.offset", |files| {
            message(files, "MessageId").field.retain(|field| field.name() != "offset");
        }),
        ("field geminga.v1.MessageId.offset", |files| {
            message(files, "MessageId").field[1].number = Some(7);
        }),
        ("field geminga.v1.MessageId.offset", |files| {
            message(files, "MessageId").field[1].set_type(Type::Uint32);
        }),
        ("field geminga.v1.MessageId.offset", |files| {
            message(files, "MessageId").field[1].set_label(Label::Repeated);
        }),
        ("message geminga.v1.MessageId", |files| {
            let common = common(files);
            common.message_type.retain(|message| message.name() != "MessageId");
        }),
        ("value geminga.v1.Codec.CODEC_ZSTD", |files| {
            let codec = common(files).enum_type.iter_mut().find(|e| e.name() == "Codec");
            codec.expect("there").value[2].number = Some(3);
        }),
        ("rpc geminga.v1.Subscriber.Settle", |files| {
            let with = files
                .file
                .iter_mut()
                .find(|file| file.service.iter().any(|service| service.name() == "Subscriber"));
            let service = &mut with.expect("there").service[0];
            let settle = service.method.iter_mut().find(|rpc| rpc.name() == "Settle");
            settle.expect("there").server_streaming = Some(true);
        }),
    ];
    for (thing, change) in changes {
        let mut changed = files.clone();
        change(&mut changed);
        let broken = breaks(&before, &surface(&changed));
        assert!(broken.iter().any(|line| line.starts_with(thing)), "{thing}: {broken:?}");
        assert_eq!(breaks(&surface(&changed), &surface(&changed)), Vec::<String>::new());
    }
    let mut more = files.clone();
    let mut field = message(&mut more, "MessageId").field[1].clone();
    (field.name, field.number) = (Some("later".into()), Some(9));
    message(&mut more, "MessageId").field.push(field);
    assert_eq!(breaks(&before, &surface(&more)), Vec::<String>::new());
    assert_eq!(
        additions(&before, &surface(&more)),
        ["field geminga.v1.MessageId.later = 9 uint64"]
    );
}

fn common(files: &mut FileDescriptorSet) -> &mut prost_types::FileDescriptorProto {
    let found = files.file.iter_mut().find(|file| file.name().ends_with("common.proto"));
    found.expect("there")
}

fn message<'a>(files: &'a mut FileDescriptorSet, name: &str) -> &'a mut DescriptorProto {
    let found = common(files).message_type.iter_mut().find(|message| message.name() == name);
    found.expect("there")
}
