//! Which segments have objects in cold storage, whether they still exist or not: where a janitor has to look (X4).

use geminga_proto::ids::{SegmentId, TopicId};

use super::janitor::SweepError;
use crate::factory::ManagedLedgers;

impl ManagedLedgers {
    /// Topics with objects, deleted ones too; none without cold storage. Odd names are left out. Cancel-safe.
    ///
    /// # Errors
    /// [`SweepError`].
    pub async fn topics_with_objects(&self) -> Result<Vec<TopicId>, SweepError> {
        let Some(cold) = self.cold() else { return Ok(Vec::new()) };
        let folders = cold.folders("").await.map_err(|error| SweepError(error.to_string()))?;
        Ok(folders.iter().filter_map(|folder| topic(folder)).collect())
    }

    /// Segments of a topic with objects; none without cold storage. Odd names are left out. Cancel-safe.
    ///
    /// # Errors
    /// [`SweepError`].
    pub async fn segments_with_objects(
        &self,
        topic: TopicId,
    ) -> Result<Vec<SegmentId>, SweepError> {
        let Some(cold) = self.cold() else { return Ok(Vec::new()) };
        let folders = cold.folders(&format!("{:016x}", topic.0)).await;
        let folders = folders.map_err(|error| SweepError(error.to_string()))?;
        let segment = |folder: &String| Some(SegmentId { topic, segment: folder.parse().ok()? });
        Ok(folders.iter().filter_map(segment).collect())
    }
}

/// The topic whose objects lie in this folder; none for somebody else's.
fn topic(folder: &str) -> Option<TopicId> {
    let id = TopicId(u64::from_str_radix(folder, 16).ok()?);
    (format!("{:016x}", id.0) == folder).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::format::segment_prefix;

    #[test]
    fn a_folder_names_its_topic_or_is_somebody_elses() {
        let id = SegmentId { topic: TopicId(0xabc), segment: 7 };
        let prefix = segment_prefix(id);
        assert_eq!(prefix.split('/').next().and_then(topic), Some(id.topic));
        for odd in ["", "abc", "0000000000000ABC", "+000000000000abc", "other"] {
            assert_eq!(topic(odd), None, "{odd:?}");
        }
    }
}
