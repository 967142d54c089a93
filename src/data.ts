/** `lowrank/data`: data files as records, and chat templates. */
export { CHATML, type Chat, type ChatTemplate, chatTemplate, loadChatTemplate } from "./io/chat-template.ts";
export {
  DATA_ENDINGS,
  type DataFile,
  type DataRecord,
  dataSplits,
  type RecordOptions,
  readRecords,
} from "./io/records.ts";
