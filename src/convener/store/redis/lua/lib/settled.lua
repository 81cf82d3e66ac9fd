-- Nothing is unanswered, or everything is taken in and the open turn waits for a person
-- (core.conversation._is_settled). Arguments as the head has them.
local function is_settled(position, done, cursor, asks)
  return position == done or (tonumber(asks or 0) > 0 and position == cursor)
end
